"""The package's logger and a warning that is given once per process."""

import logging

logger = logging.getLogger("lora_null")
_given: set[str] = set()


def warn_once(key: str, message: str) -> None:
    """Log ``message`` as a warning the first time that ``key`` is seen in this process."""
    if key not in _given:
        _given.add(key)
        logger.warning(message)


def forget_warnings() -> None:
    """Let every warning be given once more, in a long notebook or a test."""
    _given.clear()
