"""What ``test_sharding.py`` runs in two processes: each function measures and returns figures, the tests judge them."""

import json
import logging
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from sharding_tools import (
    adapted,
    checkpointed,
    compare,
    covariances,
    fsdp2,
    message_of,
    moved,
    optimizer_of,
    peft_adapted,
    save_start,
    tokens,
    train,
    whole,
)
from tiny_models import make_llama
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import lora_null
from lora_null import LoraNullConfig
from lora_null.adapters.layer import adapter_layers
from lora_null.ops import dispatch, vendor


def fsdp2_training(found, folder):
    results, makers = {}, {"": adapted, "peft ": peft_adapted}
    for kind, freeze_a in (("", True), ("", False), ("peft ", True), ("peft ", False)):
        make, name = makers[kind], f"{kind}{'frozen A' if freeze_a else 'trained A'}"
        one, start = make(found, freeze_a), make(found, freeze_a)
        # past the 16th pass, sharing groups give up factors that change at every call
        steps = 12 if freeze_a and not kind else 3
        want = train(one, steps, alone=True)
        for dtype in (None, torch.bfloat16):
            for checkpoints in (False, True) if not kind else (False,):
                many = make(found, freeze_a)
                many = fsdp2(checkpointed(many) if checkpoints else many, dtype)
                case = f"{name} {'bf16' if dtype else 'fp32'}{' checkpointed' if checkpoints else ''}"
                results[case] = compare(one, many, start, want, train(many, steps))
    return results


def ddp_training(found, folder):
    results = {}
    for freeze_a in (True, False):
        start, trained = adapted(found, freeze_a), {}
        for accumulate in (1, 2):
            one = adapted(found, freeze_a)
            trained[accumulate] = one, train(one, 3, alone=True, accumulate=accumulate)
        for case, reentrant, accumulate, options in (
            ("plain", None, 1, {}),
            ("checkpointed", False, 1, {}),
            ("checkpointed reentrant", True, 1, {}),
            ("static graph", None, 1, {"static_graph": True}),
            ("no_sync", None, 2, {"gradient_as_bucket_view": True}),
        ):
            many = adapted(found, freeze_a)
            many = many if reentrant is None else checkpointed(many, reentrant)
            wrapped = DistributedDataParallel(many, find_unused_parameters=False, **options)
            got = train(wrapped, 3, accumulate=accumulate)
            one, want = trained[accumulate]
            results[f"{case} {'frozen A' if freeze_a else 'trained A'}"] = compare(one, many, start, want, got)
    # the names of the wrapped model are not those of the model
    if dist.get_rank() == 0:
        lora_null.save_adapter(many, folder / "plain")
        lora_null.save_adapter(wrapped, folder / "ddp")
    return results


def null_basis(found, folder):
    """A learns within its free directions: trained, saved, merged and continued in shards."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    config = LoraNullConfig(r=5, lora_alpha=10, train="b_in_basis", energy=0.5)

    def make():
        return lora_null.initialize(make_llama(), found, config, progress=False).train()

    results, one, start = {}, make(), make()
    want = train(one, 3, alone=True)
    for case, wrap in {
        "fsdp2": fsdp2,
        "fsdp2 bf16": lambda model: fsdp2(model, torch.bfloat16),
        "fsdp2 checkpointed": lambda model: fsdp2(checkpointed(model)),
        "ddp checkpointed": lambda model: DistributedDataParallel(checkpointed(model)),
        "ddp": DistributedDataParallel,
    }.items():
        many = make()
        results[case] = compare(one, many, start, want, train(wrap(many), 3))
    half, options = fsdp2(make()), StateDictOptions(full_state_dict=True)
    optimizer = optimizer_of(half)
    first = train(half, 2, optimizer=optimizer)
    states = get_state_dict(half, optimizer, options=options)
    many = fsdp2(make())
    optimizer = optimizer_of(many)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_state_dict(many, optimizer, model_state_dict=states[0], optim_state_dict=states[1], options=options)
    results["continued"] = compare(one, many, start, want, first + train(many, 1, optimizer=optimizer, first=2))
    lora_null.save_adapter(many, folder / "basis")
    lora_null.merge(many)
    lora_null.merge(one)
    pairs = zip(many.parameters(), one.parameters(), strict=True)
    results["merged"] = max(float((whole(p) - q).detach().abs().max()) for p, q in pairs)
    plain = lora_null.merge(lora_null.load_adapter(make_llama(), folder / "basis"))
    results["saved"] = max(
        float((p - q).detach().abs().max()) for p, q in zip(plain.parameters(), one.parameters(), strict=True)
    )
    return results


def fsdp1_training(found, folder):
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    results = {}
    for freeze_a in (True, False, None):  # None: within the free directions
        one = adapted(found, freeze_a)
        want = train(one, 3, alone=True)
        many = FullyShardedDataParallel(
            adapted(found, freeze_a),
            auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )
        got, name = train(many, 3), f"fsdp1.{freeze_a}"
        results[str(freeze_a)] = max(abs(a - b) for a, b in zip(want, got, strict=True))
        results[f"save {freeze_a}"] = message_of(lambda many=many: lora_null.save_adapter(many, folder / "never"))
        results["merge"] = message_of(lambda many=many: lora_null.merge(many))
        with FullyShardedDataParallel.summon_full_params(many, writeback=False):
            if dist.get_rank() == 0:
                lora_null.save_adapter(many, folder / name)
                lora_null.save_adapter(one, folder / f"{name}.one")
    return results


def saving(found, folder):
    results = {}
    for kind, make, save in (
        ("", adapted, lora_null.save_adapter),
        ("peft.", peft_adapted, lora_null.peft.save_adapter),
    ):
        for freeze_a in (True, False):
            many = fsdp2(make(found, freeze_a))
            train(many, 2)
            one = make(found, freeze_a)
            with torch.no_grad():
                for mine, sharded in zip(one.parameters(), many.parameters(), strict=True):
                    mine.copy_(whole(sharded))
            name = f"{kind}{freeze_a}"
            save(many, folder / name)
            results[f"{name} written"] = (folder / name / "adapter_model.safetensors").exists()
            if dist.get_rank() == 0:
                save(one, folder / f"{name}.one")
            results[f"{name} again"] = message_of(lambda save=save, many=many, name=name: save(many, folder / name))
    with torch.no_grad():  # a NaN that one process holds alone
        layer = adapter_layers(broken := fsdp2(adapted(found)))["model.layers.1.mlp.up_proj"]
        if dist.get_rank() == 1:
            layer.lora_B.weight.to_local()[-1] = torch.nan
    results["nan save"] = message_of(lambda: lora_null.save_adapter(broken, folder / "nan"))
    results["nan merge"] = message_of(lambda: lora_null.merge(broken))
    return results


def merging(found, folder):
    results = {}
    for case in ("layers", "root only"):
        many, one = adapted(found), adapted(found)
        many = fsdp2(many) if case == "layers" else fully_shard(many)
        train(many, 2)
        with torch.no_grad():
            for mine, sharded in zip(one.parameters(), many.parameters(), strict=True):
                mine.copy_(whole(sharded))
            before = many.eval()(input_ids=tokens(0)).logits  # leaves the outermost part gathered
            lora_null.merge(many)
            lora_null.merge(one)
            after = many(input_ids=tokens(0)).logits
        results[case] = float((after - before).abs().max())
        for module in many.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        pairs = zip(many.parameters(), one.parameters(), strict=True)
        results[f"{case} weights"] = max(float((whole(p) - q).abs().max()) for p, q in pairs)
        results[f"{case} left"] = len(adapter_layers(many))
    return results


def refusals(found, folder):
    import peft

    save_start(found, folder / "start")
    sharded = fsdp2(make_llama())
    before = {name: whole(p).clone() for name, p in sharded.named_parameters()}
    model = peft.get_peft_model(make_llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    results = {
        "initialize": message_of(lambda: lora_null.initialize(sharded, found, LoraNullConfig(r=4, freeze_a=False))),
        "load_adapter": message_of(lambda: lora_null.load_adapter(sharded, folder / "start")),
        "peft": message_of(lambda: lora_null.peft.initialize_lora_null_weights(fsdp2(model), found)),
        "one process": message_of(
            lambda: lora_null.initialize(make_llama(), found, LoraNullConfig(r=400 if dist.get_rank() else 4))
        ),
        "changed": sum(not torch.equal(whole(p), before[name]) for name, p in sharded.named_parameters()),
    }
    return results


def continuing(found, folder):
    """Load an adapter, shard, train; then stop in the middle and go on from full state dicts."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    save_start(found, folder / "begin")

    def loaded():
        return fsdp2(lora_null.load_adapter(make_llama(), folder / "begin", is_trainable=True).train())

    straight = loaded()
    want = train(straight, 4)
    first, options = loaded(), StateDictOptions(full_state_dict=True)
    optimizer = optimizer_of(first)
    train(first, 2, optimizer=optimizer)
    states = get_state_dict(first, optimizer, options=options)
    second = loaded()
    optimizer = optimizer_of(second)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_state_dict(second, optimizer, model_state_dict=states[0], optim_state_dict=states[1], options=options)
    got = train(second, 2, optimizer=optimizer, first=2)
    return {"losses": [want[2:], got], "off": moved(second, straight)}


def other_factors(found, folder):
    """Load other frozen factors into the shards, which sharing groups must not overlook."""
    many = fsdp2(adapted(found).eval())
    with torch.no_grad():
        for layer in adapter_layers(many).values():
            layer.lora_B.weight.copy_(torch.full_like(layer.lora_B.weight, 0.1))
        before = many(input_ids=tokens(0)).logits
        for layer in adapter_layers(many).values():
            layer.lora_A.weight.mul_(-3)
        got = many(input_ids=tokens(0)).logits
        one = adapted(found).eval()
        for layer, sharded in zip(adapter_layers(one).values(), adapter_layers(many).values(), strict=True):
            layer.lora_A.weight.copy_(whole(sharded.lora_A.weight))
            layer.lora_B.weight.copy_(whole(sharded.lora_B.weight))
        want = one(input_ids=tokens(0)).logits
    return {"off": float((got - want).abs().max()), "changed": float((before - want).abs().max())}


def projections(found, folder):
    """Count the projections of one pass: sharing groups work under DDP, and with frozen factors kept out of FSDP2."""
    results, project = {}, vendor.project
    dispatch._uniform = dispatch._uniform.__wrapped__  # which remembers functions
    for case in ("ddp", "fsdp2", "fsdp2, frozen A ignored"):
        model = adapted(found)
        frozen = {layer.lora_A.weight for layer in adapter_layers(model).values()}
        if case == "ddp":
            model = DistributedDataParallel(model)
        else:
            ignored = frozen if "ignored" in case else None
            for layer in model.model.layers:
                fully_shard(layer, ignored_params=ignored)
            fully_shard(model, ignored_params=ignored)
        seen = []
        vendor.project = lambda *args, seen=seen, **options: seen.append(1) or project(*args, **options)
        try:
            train(model, 1)
        finally:
            vendor.project = project
        results[case] = len(seen)
    return results


def tensor_parallel(found, folder):
    """Place a layer's weight and factors by hand: by columns, by rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, results = init_device_mesh("cpu", (2,)), {}
    os.environ["LORA_NULL_STRICT"] = "0"
    for name, x_placement, placements in (
        ("gate_proj", Replicate(), {"": Shard(0), "lora_A": Replicate(), "lora_B": Shard(0)}),
        ("down_proj", Shard(2), {"": Shard(1), "lora_A": Shard(1), "lora_B": Replicate()}),
    ):
        layer = getattr(adapted(found).model.layers[0].mlp, name)
        torch.nn.init.normal_(layer.lora_B.weight, generator=torch.Generator().manual_seed(1))
        x = torch.randn(2, 5, layer.in_features, generator=torch.Generator().manual_seed(2))
        want = layer(x)
        want.square().sum().backward()
        gradient, layer.lora_B.weight.grad = layer.lora_B.weight.grad, None
        for part, placement in placements.items():
            module = layer.get_submodule(part)
            placed = distribute_tensor(module.weight.detach(), mesh, [placement])
            module.weight = torch.nn.Parameter(placed, requires_grad=module.weight.requires_grad)
        placed_x = distribute_tensor(x, mesh, [x_placement])
        y = layer(placed_x)
        y.square().sum().backward()
        results[name] = [
            float((whole(y) - want).abs().max()),
            float((whole(layer.lora_B.weight.grad) - gradient).abs().max() / gradient.abs().max()),
        ]
        os.environ["LORA_NULL_STRICT"] = "1"
        results[f"{name} strict"] = message_of(lambda layer=layer, placed_x=placed_x: layer(placed_x))
        os.environ["LORA_NULL_STRICT"] = "0"
    return results


def calibrating(found, folder):
    batches = [tokens(100 + i) for i in range(6)]

    def attempt(*data, **options):
        return message_of(lambda: lora_null.calibrate(fsdp2(make_llama()), *data, progress=False, **options))

    sharded = lora_null.calibrate(fsdp2(make_llama()), batches, progress=False)
    return {
        "off": max(float((sharded[key] - found[key]).abs().max() / found[key].abs().max()) for key in found),
        "uneven": attempt(batches[:5]),
        "unknown": attempt(iter(batches)),
        "checkpoint": attempt(batches, checkpoint=folder / "sums"),
        "low memory": attempt(batches, low_memory=True),
    }


def with_accelerate(found, folder):
    """Let accelerate shard; it chooses FSDP on GPUs only, so the choice is made for it."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    one, start, many = adapted(found), adapted(found), adapted(found)
    many, optimizer = accelerator.prepare(many, optimizer_of(many))
    result = compare(one, many, start, train(one, 3, alone=True), train(many, 3, optimizer=optimizer))
    # what a trainer's checkpoint of a sharded model is made of
    state = get_model_state_dict(many, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    lora_null.save_adapter(many, folder / "accelerate")
    if dist.get_rank() == 0:
        many.save_pretrained(folder / "checkpoint", state_dict=state)
    return {"kind": type(adapter_layers(many)["model.layers.0.mlp.up_proj"].lora_B.weight).__name__, **result}


WORK = (
    fsdp2_training,
    ddp_training,
    null_basis,
    fsdp1_training,
    saving,
    merging,
    refusals,
    continuing,
    other_factors,
    projections,
    calibrating,
    tensor_parallel,
    with_accelerate,
)


def _worker(folder: Path) -> None:
    torch.set_num_threads(1)
    logging.getLogger("lora_null").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    # nothing of what follows may leave the fast path, unless it says so
    os.environ["LORA_NULL_STRICT"] = "1"
    found = covariances()
    for work in WORK:
        results = work(found, folder)
        (folder / f"{work.__name__}.{rank}.json").write_text(json.dumps(results))
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
