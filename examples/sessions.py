"""Asks several questions about a video that is read and encoded once: python examples/sessions.py [CHECKPOINT]"""

import sys

from transformers import AutoModelForCausalLM, AutoProcessor


checkpoint = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/moss-vl-nano"
processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype="auto", device_map="auto")
query, states = {"videos": ["data/sample_b.mp4"]}, None
for question in ("When does the cross move?", "Which way does the cross move?", "When does the ring change color?"):
    query = {**query, "prompt": question, "generate_kwargs": {"max_new_tokens": 32}}
    out = model.offline_batch_generate(processor, [query], session_states=states, keep_cache=True)
    print(f"{question} {out['results'][0]['text']}")
    query, states = {}, out["session_states"]
