"""Texts, questions and tuned models for the tests of evaluation."""

import peft
import torch
from tiny_models import make_llama

import lora_null


def texts(count=7, seed=3, longest=30):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest, (count,), generator=generator).tolist()
    return [" ".join(f"w{int(i)}" for i in torch.randint(96, (n,), generator=generator)) for n in lengths]


def questions(count=10, seed=4):
    """Choices of one to three tokens; two kinds."""
    generator = torch.Generator().manual_seed(seed)

    def words(n):
        return " ".join(f"w{int(i)}" for i in torch.randint(96, (n,), generator=generator))

    made = []
    for index in range(count):
        choices = [f"w{index} {words(int(k))}".strip() for k in torch.randint(0, 3, (4,), generator=generator)]
        choices = [f"{choice} w{90 + place}" for place, choice in enumerate(choices)]
        made.append(
            {"question": words(5 + index % 3), "choices": choices, "answer": index % 4, "kind": "ab"[index % 2]}
        )
    return made


def tuned(kind):
    """Return ``(model, base to pass, untouched model)`` with an adapter that changes the outputs."""
    untouched, model = make_llama(), make_llama()
    ids = list(torch.randint(97, (6, 4, 32), generator=torch.Generator().manual_seed(1)))
    base = None
    if "A" in kind:
        covariances = lora_null.calibrate(make_llama(), ids, progress=False)
        freeze_a = "frozen" in kind
    if kind in ("frozen A", "trained A"):
        config = lora_null.LoraNullConfig(r=4, lora_alpha=8, freeze_a=freeze_a)
        model = lora_null.initialize(model, covariances, config, progress=False)
    elif kind.startswith("peft"):
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        if "A" in kind:
            lora_null.peft.initialize_lora_null_weights(model, covariances, freeze_a=freeze_a, progress=False)
    elif kind == "injected":
        model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    else:
        base = untouched
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora" in name or kind == "base"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model, base, untouched
