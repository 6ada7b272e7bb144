"""Facts of XTTS v2, as coqui-tts has them; of each is said where.

A sentence is a sequence of codes, each of which stands for `SAMPLES_PER_CODE` samples at `CODE_RATE`. The vocoder makes
audio at `OUTPUT_RATE` of frames, each of which becomes `SAMPLES_PER_FRAME` samples.
"""

#: Samples per second of the audio that codes stand for (``XttsArgs.input_sample_rate``), and of the recordings that are
#: cloned, as they are read (``load_sr`` of ``Xtts.get_conditioning_latents``).
CODE_RATE = 22050
#: Samples at `CODE_RATE` that one code stands for (``XttsArgs.gpt_code_stride_len``).
SAMPLES_PER_CODE = 1024
#: Samples per second of the audio that is spoken (``XttsArgs.output_sample_rate``).
OUTPUT_RATE = 24000
#: Samples at `OUTPUT_RATE` that the vocoder makes of one frame (``XttsArgs.output_hop_length``).
SAMPLES_PER_FRAME = 256
#: Codes per chunk of a stream, unless told otherwise (``stream_chunk_size`` of ``Xtts.inference_stream``).
STREAM_CHUNK = 20

#: ``GPT.forward`` counts this many positions more than it has codes, pads with stop tokens up to there and cuts the
#: result short by as much; by causality they can be left out.
FORWARD_TAIL = 5

#: The code that starts every sentence (``gpt_start_audio_token`` in the checkpoint's config.json; codes of audio lie
#: below it). XttsArgs has the one of XTTS v1.
START_CODE = 1024
#: The code that ends a sentence (``gpt_stop_audio_token`` in the checkpoint's config.json).
STOP_CODE = 1025
#: How many codes there are, with those two (``gpt_num_audio_tokens`` in the checkpoint's config.json).
CODES = 1026

#: Blocks of the GPT (``XttsArgs.gpt_layers``).
LAYERS = 30
#: Channels of the GPT and of its latents (``XttsArgs.gpt_n_model_channels`` and ``XttsArgs.decoder_input_dim``).
CHANNELS = 1024
#: Channels of a speaker embedding (``XttsArgs.d_vector_dim``).
SPEAKER_CHANNELS = 512
#: Bands of the mel spectrogram of a recording that is cloned (``ConditioningEncoder(80, ...)`` in ``GPT.__init__``).
MEL_BANDS = 80
#: Conditioning latents of a voice (``num_latents`` of the ``PerceiverResampler`` in ``GPT.__init__``).
CONDITIONING_LATENTS = 32


def seconds_of(codes: int) -> float:
    """Seconds of audio that a number of codes stands for."""
    return codes * SAMPLES_PER_CODE / CODE_RATE
