"""Whether weights are those that something was made for: rounded ones are, with a warning."""

import pytest
import torch
from adapter_tools import learn
from peft import LoraConfig, get_peft_model

import lora_null
from lora_null import LoraNullConfig
from lora_null import peft as lora_null_peft
from lora_null.system.log import forget_warnings

CONFIG = LoraNullConfig(r=4, train="b")
# As calibrated or trained, and as it is now.
SAME = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
ROUNDED = [(torch.float32, torch.float16), (torch.float16, torch.float32)]


def routes(llama, token_batches, folder, then, now):
    """Calibrate and train in one dtype; return the ways to use both in another."""
    covariances = lora_null.calibrate(llama(then), token_batches(), progress=False)
    trained = learn(lora_null.initialize(llama(then), covariances, CONFIG, progress=False))
    lora_null.save_adapter(trained, folder)
    model = get_peft_model(llama(now), LoraConfig(r=4, target_modules="all-linear"))
    return (
        lambda: lora_null.initialize(llama(now), covariances, CONFIG, progress=False),
        lambda: lora_null_peft.initialize_lora_null_weights(model, covariances, train="b", progress=False),
        lambda: lora_null.load_adapter(llama(now), folder),
        lambda: lora_null_peft.load_trainable(llama(now), folder),
    )


@pytest.mark.parametrize(("then", "now"), SAME + ROUNDED, ids=str)
def test_a_base_in_another_dtype(llama, token_batches, tmp_path, caplog, then, now):
    for use in routes(llama, token_batches, tmp_path / "adapter", then, now):
        forget_warnings()
        caplog.clear()
        use()
        warned = [record.message for record in caplog.records if "only by rounding" in record.message]
        assert len(warned) == ((then, now) in ROUNDED)


def test_other_weights_are_no_rounding(llama, token_batches):
    covariances = lora_null.calibrate(llama(), token_batches(), progress=False)
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    with pytest.raises(ValueError, match=r"other weights than these: .* differ by more than a load in bfloat16"):
        lora_null.initialize(model, covariances, CONFIG, progress=False)


def test_bf16_and_its_fp16_agree(llama, token_batches):
    """Small values lose bits in fp16 that bf16 has."""
    covariances = lora_null.calibrate(llama(torch.bfloat16), token_batches(), progress=False)
    model = llama(torch.bfloat16).to(torch.float16)
    lora_null.initialize(model, covariances, CONFIG, progress=False)
