"""Shows a realtime checkpoint a frame per second of a video: python examples/realtime.py [CHECKPOINT [VIDEO]]

A stream waits for the model after each frame. `create_realtime_session` takes frames while the model speaks.
"""

import sys

import av
from transformers import AutoModelForCausalLM, AutoProcessor


checkpoint = sys.argv[1] if len(sys.argv) > 1 else "checkpoints/moss-vl-nano"
video = sys.argv[2] if len(sys.argv) > 2 else "data/watching.mp4"
processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype="auto", device_map="auto")
stream = model.create_realtime_stream(processor, "Tell me when the star appears.")
second = 0
with av.open(video) as container:
    for frame in container.decode(video=0):
        if frame.time >= second:
            second += 1
            stream.push_frame(frame.to_image(), frame.time)
            while True:
                for event in stream.step():
                    print(event)
                if stream.parked:  # nothing more to say about this frame
                    break
