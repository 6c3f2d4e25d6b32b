"""Evaluation: detections and segments of a model scored, and the report written."""
