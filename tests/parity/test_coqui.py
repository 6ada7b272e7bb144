"""The facts of XTTS v2 that are written down are those of the installed coqui-tts."""

import inspect

from TTS.tts.models.xtts import Xtts, XttsArgs

from neuron_xtts.coqui import constants


def default(method, name):
    return inspect.signature(method).parameters[name].default


def test_constants_of_the_arguments():
    args = XttsArgs()
    assert constants.CODE_RATE == args.input_sample_rate == default(Xtts.get_conditioning_latents, "load_sr")
    assert args.gpt_code_stride_len == constants.SAMPLES_PER_CODE
    assert args.output_sample_rate == constants.OUTPUT_RATE
    assert args.output_hop_length == constants.SAMPLES_PER_FRAME
    assert default(Xtts.inference_stream, "stream_chunk_size") == constants.STREAM_CHUNK
    assert args.gpt_layers == constants.LAYERS
    assert constants.CHANNELS == args.gpt_n_model_channels == args.decoder_input_dim
    assert args.d_vector_dim == constants.SPEAKER_CHANNELS


def test_constants_of_a_model(xtts, voice):
    latents, speaker = voice
    assert latents.shape[1] == constants.CONDITIONING_LATENTS
    assert speaker.shape[1] == constants.SPEAKER_CHANNELS
    assert xtts.gpt.conditioning_encoder.init.in_channels == constants.MEL_BANDS
    assert constants.CODES == xtts.gpt.mel_head.out_features == constants.STOP_CODE + 1 == constants.START_CODE + 2


def test_seconds_of_codes(xtts, voice):
    """As long as coqui-tts's own audio, but for the frame that interpolation rounds away."""
    spoken = xtts.inference("the band plays.", "en", *voice, min_new_tokens=40, max_new_tokens=40)["wav"]
    seconds = len(spoken) / constants.OUTPUT_RATE
    assert 0 <= constants.seconds_of(40) - seconds < constants.SAMPLES_PER_FRAME / constants.OUTPUT_RATE
