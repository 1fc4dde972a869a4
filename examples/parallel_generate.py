"""Text from a packed folder, each process holding a part of every layer.

torchrun --nproc-per-node 2 examples/parallel_generate.py DIR "Once upon a time"
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from pyllmq import parallel
from pyllmq.loading import load_tokenizer


def main(folder: str, prompt: str) -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo")
    if cuda:
        torch.cuda.set_device(device)
    model, tokenizer = parallel.from_pretrained(folder, device_map=device), load_tokenizer(folder)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(device)
    made = model.generate(ids, max_new_tokens=32, do_sample=False)  # sampling needs one seed for all processes
    if dist.get_rank() == 0:
        print(model.tensor_parallel_plan)
        print(tokenizer.decode(made[0], skip_special_tokens=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
