"""A model behind HTTP: an endpoint, health, metrics and a page to try it; extra `serve`."""

from cdetr_fast.serving.app import create_app
from cdetr_fast.serving.settings import ServingSettings

__all__ = ["ServingSettings", "create_app"]
