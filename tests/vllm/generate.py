"""Generate with the vLLM of this environment, and print tokens and log-probabilities as JSON: `generate.py FOLDER`."""

import json
import os
import sys

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

from vllm import LLM, SamplingParams

PROMPTS = [[1, 2, 3], [10, 20, 30, 40, 50, 60, 70], [5] * 20]


def main(folder: str) -> None:
    model = LLM(folder, skip_tokenizer_init=True, enforce_eager=True, max_model_len=128, dtype="float32")
    greedy = SamplingParams(temperature=0, detokenize=False, max_tokens=64, logprobs=1, ignore_eos=True)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], greedy, use_tqdm=False)
    results = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        chosen = [entry[token].logprob for token, entry in zip(tokens, output.outputs[0].logprobs, strict=True)]
        results.append({"prompt": prompt, "tokens": tokens, "log_probabilities": chosen})
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
