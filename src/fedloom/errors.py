"""Errors that a user of fedloom may catch."""

from fedloom.core.errors import Refused

__all__ = ["Refused"]
