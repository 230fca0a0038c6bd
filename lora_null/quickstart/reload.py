"""Load a saved adapter with stock PEFT in a fresh process and compare its logits with recorded ones.

Run as a script, by path, so that this package is not imported: the point is that nobody needs it to use an adapter.
"""

import json
import sys
from typing import Any


def main(model: str, adapter: str, recorded: str, kind: str, options: str) -> None:
    """Print ``{"difference": ..., "largest_logit": ..., "modules": [...]}`` as the last line of stdout."""
    import torch
    import transformers
    from peft import PeftModel
    from safetensors.torch import load_file

    expected = load_file(recorded)
    of_model: Any = getattr(transformers, kind, transformers.AutoModelForCausalLM)
    base = of_model.from_pretrained(model, **json.loads(options))
    loaded = PeftModel.from_pretrained(base, adapter).eval()
    with torch.inference_mode():
        logits = loaded(input_ids=expected["input_ids"].to(base.device)).logits.float().cpu()
    result = {
        "difference": float((logits - expected["logits"]).abs().max()),
        "largest_logit": float(expected["logits"].abs().max()),
        "modules": sorted(name for name in sys.modules if name.split(".")[0] == "lora_null"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
