"""GPTQ by llm-compressor, in an environment of its own: MODEL CALIBRATION.safetensors OUT BITS GROUP. Its last line: seconds it took."""

import sys
import time

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

source, text, out, bits, group = sys.argv[1:]
ids = load_file(text)["ids"]
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": [[1] * ids.shape[1]] * len(ids)})
weights = QuantizationArgs(num_bits=int(bits), type="int", strategy="group", group_size=int(group), symmetric=True)
scheme = QuantizationScheme(targets=["Linear"], weights=weights)
model = AutoModelForCausalLM.from_pretrained(source, dtype="float32", local_files_only=True)
started = time.perf_counter()
oneshot(
    model=model,
    dataset=data,
    recipe=GPTQModifier(ignore=["lm_head"], config_groups={"group_0": scheme}),
    max_seq_length=ids.shape[1],
    num_calibration_samples=len(ids),
)
seconds = time.perf_counter() - started
model.bfloat16().save_pretrained(out, save_compressed=True)
print(seconds)
