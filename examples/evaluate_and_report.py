"""Say what an adapter has kept and learned. The same in a shell: lora-null eval MODEL ADAPTER --keep K --task T."""

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_null

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("keep", type=Path, help="text like what must not be forgotten, held out")
parser.add_argument("task", type=Path, help="text of the task, held out")
parser.add_argument("adapter", help="adapter folder")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--questions", type=Path, help=".jsonl: question, choices, answer")
parser.add_argument("--json", type=Path, help="write every figure to this file")
args = parser.parse_args()

model = lora_null.load_adapter(AutoModelForCausalLM.from_pretrained(args.model), args.adapter)
tokenizer = AutoTokenizer.from_pretrained(args.model)
keep, task = (file.read_text().split("\n\n") for file in (args.keep, args.task))
found = lora_null.evaluate(model, tokenizer, keep=keep, task=task, questions=args.questions)

for name, text in (("kept text", found.keep), ("task", found.task)):
    loss = text.cross_entropy
    print(f"{name}: {loss.before.value:.3f} to {loss.after.value:.3f} nats per token, change {loss.change}")
print(f"forgetting, without labels: KL {found.keep.kl}, the same first choice at {found.keep.agreement}")
if found.questions:
    print(
        f"questions: {found.questions.accuracy.before.value:.3f} right before, change {found.questions.accuracy.change}"
    )
if args.json:
    args.json.write_text(json.dumps(found.to_dict(), indent=2))
