"""Write what servers read, a plain adapter and a merged model, and say the commands that serve them."""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_null
from lora_null.adapters import export_adapter

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("checkpoint", help="adapter folder or a trainer's checkpoint")
parser.add_argument("output", type=Path, help="folder to write")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
args = parser.parse_args()

adapter, merged = args.output / "adapter", args.output / "merged"
export_adapter(args.checkpoint, adapter, dtype=torch.bfloat16, base_model_name_or_path=args.model)
model = lora_null.load_adapter(AutoModelForCausalLM.from_pretrained(args.model), adapter)
lora_null.merge(model).save_pretrained(merged)
AutoTokenizer.from_pretrained(args.model).save_pretrained(merged)

rank = json.loads((adapter / "adapter_config.json").read_text())["r"]
limit = min(size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank)  # vLLM's choices
print(f"""# llama.cpp, from its folder
python convert_hf_to_gguf.py {args.model} --outfile base.gguf
python convert_lora_to_gguf.py {adapter} --base {args.model} --outfile adapter.gguf
llama-server -m base.gguf --lora adapter.gguf
# vLLM, SGLang
vllm serve {args.model} --enable-lora --lora-modules tuned={adapter} --max-lora-rank {limit}
python -m sglang.launch_server --model-path {args.model} --enable-lora --lora-paths tuned={adapter}
# ONNX, whole
optimum-cli export onnx --model {merged} onnx""")
