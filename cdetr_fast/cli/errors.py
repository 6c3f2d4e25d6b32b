"""Errors that users can put right, and packages that a command needs."""

from importlib.util import find_spec


class UserError(Exception):
    """Something that the user can put right; reported as one line."""


def require_packages(*modules: str, extra: str) -> None:
    """Raise UserError with the extra to install if one of the modules is missing."""
    if missing := [name for name in modules if not _is_installed(name)]:
        raise UserError(f"{', '.join(missing)} missing: pip install 'cdetr-fast[{extra}]'")


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # `sys.modules[name]` is None
        return False
