"""Draws what a word of an answer looked at: pip install . && python examples/heat_maps.py OUT.png [CHECKPOINT]"""

import sys

from moss_vl.modeling_moss_vl import MossVLForConditionalGeneration
from moss_vl.processing_moss_vl import MossVLProcessor
from moss_vl.tools.attention_maps import SeenFrames, answer_words, draw_map, word_attention


if len(sys.argv) < 2:
    sys.exit(__doc__)
out, checkpoint = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "checkpoints/moss-vl-nano"
processor = MossVLProcessor.from_pretrained(checkpoint)
model = MossVLForConditionalGeneration.from_pretrained(checkpoint, dtype="auto", device_map="auto")
query = {"images": ["data/sample_a.jpg"], "prompt": "What color is the cross?"}
answered = model.offline_batch_generate(processor, [query], keep_cache=True)
answer, kept = answered["results"][0]["text"], answered["session_states"][0].kept
word = answer_words(processor, kept, answer)[0]
weights = word_attention(model, kept, word.tokens)
draw_map(SeenFrames.read(processor, kept).image(0), weights.maps[0], weights.peak).save(out)
print(f"{word.text}: {weights.shares[0]:.0%} of the attention went to the picture, as drawn in {out}")
