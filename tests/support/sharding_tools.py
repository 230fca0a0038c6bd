"""Models, training and comparison that the sharded runs share."""

from contextlib import nullcontext

import torch
import torch.distributed as dist
from tiny_models import make_llama
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_null
from lora_null import LoraNullConfig


def tokens(seed, batch=4):
    return torch.randint(97, (batch, 64), generator=torch.Generator().manual_seed(seed))


def covariances():
    return lora_null.calibrate(make_llama(), [tokens(100 + i) for i in range(6)], progress=False)


def adapted(found, freeze_a=True):
    # an odd rank gives the processes shards of different size
    config = LoraNullConfig(r=5, lora_alpha=10, freeze_a=freeze_a)
    return lora_null.initialize(make_llama(), found, config, progress=False).train()


def peft_adapted(found, freeze_a=True):
    import peft

    model = peft.get_peft_model(make_llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    lora_null.peft.initialize_lora_null_weights(model, found, freeze_a=freeze_a, progress=False)
    lora_null.peft.use_fused_kernels(model)
    return model.train()


def fsdp2(model, dtype=None):
    """Shard every decoder layer, and the rest."""
    options = {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)} if dtype else {}
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in plain.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def checkpointed(model, reentrant=False):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def optimizer_of(model):
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.5)


def train(model, steps, *, alone=False, accumulate=1, optimizer=None, first=0):
    """Train on the same global batches, whole or this process's half; returns the mean losses."""
    optimizer, losses = optimizer or optimizer_of(model), []
    for step in range(first, first + steps):
        for turn in range(accumulate):
            ids = tokens(step * accumulate + turn)
            ids = ids if alone else ids.chunk(2)[dist.get_rank()]
            waits = turn < accumulate - 1 and isinstance(model, DistributedDataParallel)
            with model.no_sync() if waits else nullcontext():
                loss = model(input_ids=ids, labels=ids).loss / accumulate
                loss.backward()
        loss = loss.detach().float()
        if not alone:
            dist.all_reduce(loss)
            loss /= 2
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def moved(model, start):
    """Norm of what training has changed, and with ``start`` another trained model: the norm of the difference."""
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    return float(sum((whole(p) - whole(q)).square().sum() for p, q in pairs).sqrt())


def compare(one, many, start, want, got):
    return {
        "loss": max(abs(a - b) for a, b in zip(want, got, strict=True)),
        "moved": moved(one, start),
        "off": moved(many, one) / moved(one, start),
    }


def save_start(found, path):
    """All processes solve for the null spaces together; one writes."""
    model = adapted(found)
    if dist.get_rank() == 0:
        lora_null.save_adapter(model, path)
    dist.barrier()


def message_of(work):
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"
