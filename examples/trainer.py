"""Fine-tune with transformers.Trainer. Texts are files of documents with blank lines between them."""

import argparse
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import lora_null

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("keep", type=Path, help="text like what must not be forgotten")
parser.add_argument("learn", type=Path, help="text of the task")
parser.add_argument("output", help="adapter folder to write")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--rank", type=int, default=32)
parser.add_argument("--steps", type=int, default=100)
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
keep, learn = ([tokenizer(text) for text in file.read_text().split("\n\n")] for file in (args.keep, args.learn))

config = lora_null.LoraNullConfig(r=args.rank)
collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
covariances = lora_null.calibrate(model, [collate([document]) for document in keep], config)
model = lora_null.initialize(model, covariances, config)

options = TrainingArguments(f"{args.output}-run", max_steps=args.steps, learning_rate=1e-3, report_to=[])
Trainer(model, options, train_dataset=learn, data_collator=collate).train()
lora_null.save_adapter(model, args.output)
