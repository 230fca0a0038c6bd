"""The whole way with an installed package and nothing else: no repository, no pytest. Run in an empty folder.

``python smoke.py [compiled | plain]`` says whether the C++ extension has to be there.
"""

import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import lora_null
from lora_null.system import extension

SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}


def model():
    """Return a small random LLaMA, always the same."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_key_value_heads=2, **SIZES)).eval()


def main(wanted: str | None = None) -> None:
    """Calibrate, initialise, train a step, save, reload with stock PEFT, merge, ask the command line."""
    assert "site-packages" in str(Path(lora_null.__file__).parent), lora_null.__file__
    ids = torch.randint(97, (8, 32), generator=torch.Generator().manual_seed(1))
    config = lora_null.LoraNullConfig(r=4)
    tuned = model()
    before = tuned(input_ids=ids).logits
    covariances = lora_null.calibrate(tuned, list(ids[:, None]), config, progress=False)
    lora_null.initialize(tuned, covariances, config, progress=False)
    # Asked after the first solve: a wheel compiles the extension there, not on import.
    assert wanted is None or (extension.ready() is not None) == (wanted == "compiled"), wanted
    assert torch.equal(tuned(input_ids=ids).logits, before)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    tuned(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = tuned(input_ids=ids).logits
    assert not torch.equal(after, before)
    lora_null.save_adapter(tuned, "adapter")
    stock = PeftModel.from_pretrained(model(), "adapter")
    assert torch.allclose(stock(input_ids=ids).logits, after, atol=1e-5)
    assert torch.allclose(lora_null.merge(tuned)(input_ids=ids).logits, after, atol=1e-5)
    command = [Path(sys.executable).with_name("lora-null"), "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert version == f"lora_null {lora_null.__version__}", version
    print(f"{version}: python {sys.version.split()[0]}, torch {torch.__version__}, extension {extension.ready()}")


if __name__ == "__main__":
    main(*sys.argv[1:])
