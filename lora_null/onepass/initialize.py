"""An adapter from a model that is never in memory as a whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..calibration.batches import iterate
from ..calibration.options import Options
from ..calibration.texts import token_batches
from ..config import LoraNullConfig
from ..covariances.covariances import Covariances
from ..models.arguments import PATH, takes
from ..models.loading import load_tokenizer
from ..models.parts import is_encoder_decoder
from ..models.settings import Loading
from ..system.distributed import announcing_failure, is_shared_out, share_of
from ..system.files import require_writable
from ..system.log import logger
from .run import OnePass


@takes(model=PATH, config=LoraNullConfig, output=PATH, task=Covariances)
def initialize_streaming(
    model: str | os.PathLike,
    batches: Any,
    config: LoraNullConfig,
    output: str | os.PathLike,
    *,
    task: Covariances | None = None,
    method: str = "auto",
    mask: str = "attention",
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    memory_limit: int | None = None,
    queue_tokens: int = 4096,
    accumulate: str = "fp32",
    share_inputs: bool = True,
    keep_covariances: str | os.PathLike | None = None,
    verify_base: bool = True,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Write the adapter that training starts from, while the model on disk is read one decoder layer at a time.

    Each layer's weights are read, run on all batches, and its covariances summed, solved and dropped; its hidden states
    go through a file to the next. In memory are the embedding while the first layer runs, one layer, its covariances
    and the solver's workspace: the plan in the log (at level INFO) says how much before the run, and a plan that does
    not fit is refused. The result has the bits of :func:`lora_null.calibrate`, :func:`lora_null.initialize` and
    :func:`lora_null.save_adapter` on the model in memory, with the same number of torch's threads.

    What is finished lies in a hidden folder beside ``output`` until the end. A run that was killed goes on from there
    when it is started again with the same arguments, to the same bits.

    All processes of a ``torch.distributed`` group call this with the same arguments. Each takes its share of the
    batches, unless a ``DistributedSampler`` does that already, and keeps the hidden states of these beside ``output``;
    sums are added up, solves divided, and the first process writes. The plan is that of one process.

    Args:
        model: A folder with weights as safetensors, or a Hugging Face model id.
        batches: A list of texts, which are tokenised with the model's own tokenizer; or as for
            :func:`lora_null.calibrate`.
        config: As for :func:`lora_null.initialize`, without ``modules_to_save``.
        output: The adapter folder to make; it appears whole or not at all.
        task: See :func:`lora_null.initialize`.
        method: See :func:`lora_null.null_space`.
        mask: See :func:`lora_null.calibrate`.
        device: Where a layer runs and its null spaces are solved.
        dtype: Of the weights; ``"auto"``: as saved.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the model.
        memory_limit: Bytes that the plan may use per device, on top of this process before the run; the default is the
            memory that is free.
        queue_tokens: See :func:`lora_null.calibrate`.
        accumulate: See :func:`lora_null.calibrate`.
        share_inputs: See :func:`lora_null.calibrate`.
        keep_covariances: File for the covariances, too.
        verify_base: Refuse a task's covariances of other weights; one layer after another is read for it.
        overwrite: Replace an existing adapter folder, and an existing file of covariances.
        progress: Show a progress bar.

    Raises:
        TypeError: A batch is of no known form.
        ValueError: What :func:`lora_null.calibrate` and :func:`lora_null.initialize` refuse; the model is quantised, an
            encoder-decoder, or its weights cannot be read layer by layer; a killed run was of other arguments, or
            of another number of processes; a process has no batch.
        FileExistsError: An output exists and must not be replaced.
    """
    loading = Loading(dtype=dtype, device=str(device), revision=revision, trust_remote_code=trust_remote_code)
    options = Options(
        mask=mask,
        device=device,
        low_memory=True,
        memory_limit=memory_limit,
        queue_tokens=queue_tokens,
        accumulate=accumulate,
        share_inputs=share_inputs,
        progress=progress,
    )
    keep = None if keep_covariances is None else Path(keep_covariances)
    for path in (Path(output), keep):
        if path is not None:
            require_writable(path)
    chosen: dict[str, Any] = {"task": task, "method": method, "keep": keep, "verify_base": verify_base}
    prepared = prepare(str(model), batches, config, options, loading, **chosen)
    prepared.run(Path(output), overwrite=overwrite)


def prepare(
    model: str,
    batches: Any,
    config: LoraNullConfig,
    options: Options,
    loading: Loading,
    *,
    task: Covariances | None = None,
    method: str = "auto",
    keep: Path | None = None,
    verify_base: bool = True,
) -> OnePass:
    """Check everything and plan, see :func:`initialize_streaming`; nothing is written."""
    if config.train == "b_in_basis" and keep is None:
        logger.warning(
            "The adapter starts within its free directions and, with train='b_in_basis', learns there only beside the "
            "covariances, which are not kept: pass keep_covariances (--keep-covariances FILE), or take train='b'."
        )

    def read(hollow: Any) -> Any:
        if is_encoder_decoder(hollow):
            raise ValueError(
                f"{type(hollow).__name__} has an encoder and a decoder; expected a decoder alone, to be read one layer "
                "at a time. Use lora_null.calibrate and lora_null.initialize on the model in memory."
            )
        texts = isinstance(batches, Sequence) and len(batches) and all(isinstance(text, str) for text in batches)
        given = token_batches(load_tokenizer(model, loading), batches) if texts else batches
        source = iterate(given, options.queue_tokens)
        return source if is_shared_out(given) else share_of(source)

    chosen: dict[str, Any] = {"task": task, "method": method, "keep_covariances": keep, "verify_base": verify_base}
    with announcing_failure():
        return OnePass.of(model, read, config, options, loading, **chosen)
