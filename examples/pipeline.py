"""Asks about a picture with a pipeline of transformers: python examples/pipeline.py [CHECKPOINT]"""

import sys

from transformers import pipeline


checkpoint = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/moss-vl-nano"
ask = pipeline("image-text-to-text", model=checkpoint, trust_remote_code=True, dtype="auto", device_map="auto")
question = [{"type": "image", "image": "data/example_image.jpg"}, {"type": "text", "text": "What color is the star?"}]
answer = ask(text=[{"role": "user", "content": question}], max_new_tokens=64, return_full_text=False)
print(answer[0]["generated_text"])
