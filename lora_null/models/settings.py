"""How a model is loaded; the command line has a flag for each field."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import helped


@dataclass(frozen=True)
class Loading:
    """What transformers' ``from_pretrained`` is told, under its names."""

    dtype: str = helped("bfloat16, ...; auto: saved.", "auto")
    device: str = helped("auto, cpu, cuda:1, ...", "auto")
    device_map: str | None = helped("accelerate's, instead of device: auto, ...", None)
    revision: str | None = helped("Branch, tag or commit on the hub.", None)
    trust_remote_code: bool = helped("Run code that comes with the model.", False)

    def __post_init__(self) -> None:
        if self.device_map is not None and self.device != "auto":
            raise ValueError(
                f"device is {self.device!r} and device_map {self.device_map!r}; expected one of them: a device for the "
                "whole model, or a map."
            )

    @property
    def source(self) -> dict[str, Any]:
        """What the configuration and the tokenizer are loaded with, too."""
        source: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        return source if self.revision is None else {**source, "revision": self.revision}
