"""Prints an answer while it is written: python examples/streaming.py [CHECKPOINT]"""

import sys

from transformers import AutoModelForCausalLM, AutoProcessor, TextStreamer


checkpoint = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/moss-vl-nano"
processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype="auto", device_map="auto")
part = {"type": "video", "video": "data/sample_b.mp4", "fps": 1.0}
chat = [{"role": "user", "content": [part, {"type": "text", "text": "What happens?"}]}]
inputs = processor.apply_chat_template(
    chat, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
)
streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
model.generate(**inputs.to(model.device), max_new_tokens=128, streamer=streamer)
