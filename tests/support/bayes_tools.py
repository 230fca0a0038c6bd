"""Small models with trained adapters of every kind that a posterior is fitted to, and labelled batches."""

import torch
from adapter_tools import learn, trained

KINDS = ["basis", "frozen", "shifted", "peft"]


def adapted(kind, llama, token_batches, dtype=torch.float32):
    """Return a LLaMA with random factors: our A within free directions, frozen, or on a shifted base, or PEFT's."""
    if kind == "basis":
        return learn(trained(llama, token_batches, dtype, train="b_in_basis"))
    if kind != "peft":
        return trained(llama, token_batches, dtype, freeze_a=kind == "frozen")
    return with_peft(llama(dtype))


def with_peft(model, r=6, **config):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=r, target_modules=["q_proj", "v_proj", "down_proj"], **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def labelled_batches(count=2, batch=3, length=12, seed=5):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(97, (batch, length), generator=generator)
        labels = ids.clone()
        labels[:, : length // 2] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


@torch.no_grad()
def well_predicted(model, **options):
    """Return batches whose labels are what the model finds most probable: noise costs likelihood."""
    batches = labelled_batches(**options)
    for batch in batches:
        best = model(input_ids=batch["input_ids"]).logits.argmax(-1)
        batch["labels"][:, 1:] = best[:, :-1].where(batch["labels"][:, 1:] != -100, -100)
    return batches


class SoftmaxRegression(torch.nn.Module):
    """``logits = W x`` for a batch of vectors: its loss's curvature is known exactly."""

    def __init__(self, d=5, classes=4, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(d, classes, bias=False, dtype=dtype)

    def forward(self, x):
        return self.linear(x)
