"""Programs that read our adapters, each by its own code: ``make test-readers``, or pytest on this file.

None is installed for it: what is missing is skipped with the reason. Packages may lie in a folder of ``PYTHONPATH``
(``pip install --no-deps --target``); ``LLAMA_CPP`` names a source tree of llama.cpp that was built in its ``build``.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from adapter_tools import learn
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_llama

import lora_null
from lora_null import peft as lora_null_peft
from lora_null.adapters import export_adapter

MODES = {"b": {}, "b_in_basis": {"energy": 0.9}, "ab": {}}
ROUTES = ("save_adapter", "peft.save_adapter", "save_pretrained", "export")
R = 6


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A model in a folder, with heads of a size that ggml knows."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    folder = tmp_path_factory.mktemp("base")
    make_llama(vocab_size=320, **sizes).save_pretrained(folder)
    return str(folder)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def covariances(base):
    draw = torch.Generator().manual_seed(1)
    return lora_null.calibrate(load(base), [torch.randint(97, (8, 32), generator=draw)], progress=False)


@pytest.fixture(params=[(mode, route) for mode in MODES for route in ROUTES], ids="-".join)
def adapter(request, base, covariances, tmp_path):
    """A trained adapter in a folder, and the model that it was trained in."""
    mode, route = request.param
    folder = tmp_path / "adapter"
    if route == "save_adapter":
        config = lora_null.LoraNullConfig(r=R, lora_alpha=3 * R, train=mode, **MODES[mode])
        model = lora_null.initialize(load(base), covariances, config, progress=False)
        lora_null.save_adapter(learn(model), folder, base_model_name_or_path=base)
        return folder, model
    options = {"use_rslora": True, "rank_pattern": {"q_proj": 3}} if route == "export" else {}
    model = get_peft_model(load(base), LoraConfig(r=R, lora_alpha=3 * R, target_modules="all-linear", **options))
    lora_null_peft.initialize_lora_null_weights(model, covariances, train=mode, progress=False, **MODES[mode])
    learn(model)
    if route == "save_pretrained":
        model.save_pretrained(str(folder))
    else:
        lora_null_peft.save_adapter(model, folder, base_model_name_or_path=base)
    if route == "export":
        # of what PEFT alone reads, for readers that know one rank and lora_alpha / r
        export_adapter(folder, tmp_path / "exported", base_model_name_or_path=base)
        return tmp_path / "exported", model
    return folder, model


def tokens(count=12):
    return torch.randint(1, 97, (1, count), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model, ids=None):
    return model.eval()(input_ids=tokens() if ids is None else ids).logits


def assert_trained(got, model, base, bound=1e-4):
    want, plain = logits(model), logits(load(base))
    assert (got - want).norm() <= bound * (want - plain).norm()


def test_vllm(adapter, base, monkeypatch):
    """Its PEFTHelper and LoRAModel: what they make of the tensors is the change of every weight."""
    helpers, models = (
        pytest.importorskip(f"vllm.lora.{name}", exc_type=ImportError) for name in ("peft_helper", "lora_model")
    )
    # There is no GPU to pin memory for.
    monkeypatch.setattr(models, "PIN_MEMORY", False)
    folder, model = adapter
    helper = helpers.PEFTHelper.from_local_dir(str(folder), max_position_embeddings=128)
    assert not helper._validate_features()
    named = {name for name in json.loads((folder / "adapter_config.json").read_text())["target_modules"]}
    read = models.LoRAModel.from_local_checkpoint(
        str(folder), {name.split(".")[-1] for name in named}, helper, lora_model_id=1, device="cpu", dtype=torch.float32
    )
    whole = load(base)
    with torch.no_grad():
        for name, layer in read.loras.items():
            weight = whole.get_submodule(name).weight
            # as its kernels do it: the scaling is alpha / r
            weight += layer.scaling * (layer.lora_b @ layer.lora_a).view_as(weight)
    assert_trained(logits(whole), model, base)


def test_mergekit(adapter, base, tmp_path):
    common = pytest.importorskip("mergekit.common", exc_type=ImportError)
    folder, model = adapter
    merged = common.ModelReference.parse(f"{base}+{folder}").merged(cache_dir=str(tmp_path / "cache"))
    assert_trained(logits(load(merged.model.path)), model, base)


def test_onnxruntime(adapter, base, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    folder, model = adapter

    class Logits(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids):
            return self.inner(input_ids=ids, use_cache=False).logits

    for loaded in (lora_null.load_adapter(load(base), folder), PeftModel.from_pretrained(load(base), str(folder))):
        torch.onnx.export(Logits(loaded).eval(), (tokens(),), str(tmp_path / "model.onnx"), dynamo=True)
        session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {session.get_inputs()[0].name: tokens().numpy()})
        assert_trained(torch.from_numpy(got), model, base)


class TestLlamaCpp:
    """Its converters, and greedy tokens of its server."""

    @pytest.fixture(scope="session")
    def tree(self):
        tree = Path(os.environ.get("LLAMA_CPP", "/nowhere"))
        if not (tree / "convert_lora_to_gguf.py").exists():
            pytest.skip("LLAMA_CPP names no source tree of llama.cpp")
        return tree

    @pytest.fixture(scope="session")
    def whole(self, tree, base, tmp_path_factory):
        sentencepiece = pytest.importorskip("sentencepiece", reason="the converter needs sentencepiece")
        folder = tmp_path_factory.mktemp("gguf")
        (folder / "text").write_text("llamas walk through the mountains\n" * 40)
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text"), model_prefix=f"{base}/tokenizer", vocab_size=300, byte_fallback=True,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        file = folder / "base.gguf"
        convert(tree, "convert_hf_to_gguf.py", base, "--outfile", file, "--outtype", "f32")
        return file

    def test_converters(self, adapter, base, tree, tmp_path):
        gguf = pytest.importorskip("gguf")
        folder, _ = adapter
        convert(tree, "convert_lora_to_gguf.py", folder, "--base", base, "--outfile", tmp_path / "lora.gguf")
        read = gguf.GGUFReader(tmp_path / "lora.gguf")
        found = {tensor.name: torch.tensor(tensor.data) for tensor in read.tensors}
        alpha = float(read.fields["adapter.lora.alpha"].contents())
        names = {name for name in found if name.endswith(".lora_a")}
        assert names and len(found) == 2 * len(names)
        change = sum(
            float((alpha / len(found[name]) * found[name[:-1] + "b"] @ found[name]).norm() ** 2) for name in names
        )
        # Their order and the permutation of q and k leave the norms of all weights together.
        peft = PeftModel.from_pretrained(load(base), str(folder))
        layers = lora_null_peft.lora_layers(peft).values()
        want = sum(float(layer.get_delta_weight("default").norm() ** 2) for layer in layers)
        assert change == pytest.approx(want, rel=1e-2 if found[min(names)].dtype == torch.float16 else 1e-4)

    def test_greedy_tokens(self, adapter, base, tree, whole, tmp_path):
        server = tree / "build" / "bin" / "llama-server"
        if not server.exists():
            pytest.skip("llama-server is not built")
        folder, model = adapter
        file = tmp_path / "lora.gguf"
        convert(tree, "convert_lora_to_gguf.py", folder, "--base", base, "--outfile", file, "--outtype", "f32")
        got = served(server, whole, file, tokens()[0].tolist(), 24)
        with torch.no_grad():
            found = [
                each.eval()
                .generate(input_ids=tokens(), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)[
                    0, tokens().shape[1] :
                ]
                .tolist()
                for each in (model, load(base))
            ]
        assert got == found[0] != found[1]


def convert(tree, script, *arguments):
    subprocess.run(
        [sys.executable, str(tree / script), *map(str, arguments)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tree / "gguf-py"), os.environ.get("PYTHONPATH", "")])},
    )


def served(server, whole, adapter, prompt, count):
    """Return the tokens that the server goes on with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [server, "-m", whole, "--lora", adapter, "--port", port, "-c", 128, "-t", 1, "-np", 1, "--no-warmup"]
    # By default keys and values are kept in fp16, which decides between tokens that are close.
    command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen([*map(str, command)], stdout=quiet, stderr=quiet)
    try:
        asked = {"prompt": prompt, "n_predict": count, "temperature": 0, "return_tokens": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/completion", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        for _ in range(120):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)["tokens"]
            except OSError:
                assert process.poll() is None, "llama-server has ended"
                time.sleep(0.5)
        raise TimeoutError("llama-server did not answer")
    finally:
        process.terminate()
        process.wait()
