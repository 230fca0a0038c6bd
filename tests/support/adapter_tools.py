"""A small model with adapters that have learned something, and token ids to compare logits on."""

import torch

import lora_null
from lora_null.adapters.layer import adapter_layers

R = 6


def ids(seed=3):
    return torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(seed))


def learn(model, seed=0):
    """Change what is trained, as an optimiser would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def optimise(model, batches, lr=1e-2):
    """Take a step of Adam on each batch of token ids."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for batch in batches:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def trained(llama, token_batches, dtype=torch.float32, seed=0, **config):
    model = llama(dtype)
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R, **config), progress=False)
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for factor in (layer.lora_A, layer.lora_B):
                if factor.weight.requires_grad:
                    factor.weight.add_(0.1 * torch.randn_like(factor.weight))
    return model
