"""Answers many queries beside each other, in pieces as they come: python examples/batches.py [CHECKPOINT]"""

import sys

from transformers import AutoModelForCausalLM, AutoProcessor


checkpoint = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/moss-vl-nano"
processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype="auto", device_map="auto")
queries = [
    {"images": ["data/example_image.jpg"], "prompt": "What color is the star?"},
    {"images": ["data/sample_a.jpg"], "prompt": "How many objects are there?"},
    {"videos": ["data/example_video.mp4"], "prompt": "When does the star appear?"},
]
for event in model.stream_batch(processor, queries, batch_size=8):
    if event.kind == "piece":
        print(f"{event.index}: ...{event.text}")
    elif event.kind == "error":  # ends this query only
        print(f"{event.index}: failed: {event.error}")
    else:
        print(f"{event.index}: {event.text}")
