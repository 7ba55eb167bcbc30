"""quaver makes a Qwen3-TTS voice model small, proves that it is still good, and runs it fast.

from quaver import TTS, Engine, Utterance, audio
tts = TTS.load("tiny")
speech = Engine(tts).say(Utterance("Good morning to you all.", "english", tts.voice("me.wav")))
audio.write("out.wav", speech.audio)
"""

from quaver import audio
from quaver.audio import Audio
from quaver.checkpoint import Checkpoint
from quaver.engine import Engine, Speech
from quaver.errors import QuaverError
from quaver.model.tts import TTS, Logits, Prompt, Utterance
from quaver.sampling import Sampling
from quaver.voice import Voice

__all__ = [
    "TTS",
    "Audio",
    "Checkpoint",
    "Engine",
    "Logits",
    "Prompt",
    "QuaverError",
    "Sampling",
    "Speech",
    "Utterance",
    "Voice",
    "audio",
]
