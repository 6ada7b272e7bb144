"""Routes: coqui-tts's calls translated into graph calls. `ROUTES` has them all."""

from neuron_xtts.routes.base import Kind, Route
from neuron_xtts.routes.conditioning import get_style_emb
from neuron_xtts.routes.generate import generate, own_generate
from neuron_xtts.routes.latents import forward as make_latents
from neuron_xtts.routes.seeds import check_seed
from neuron_xtts.routes.speech import inference, inference_stream
from neuron_xtts.routes.stream import compute_embeddings, get_generator, own_generator
from neuron_xtts.routes.vocoder import forward as vocode
from neuron_xtts.routes.vocoder import inference as vocode_in_inference_mode
from neuron_xtts.routes.voice import get_conditioning_latents, get_speaker_embedding
from neuron_xtts.timeline import Phase

# In the order of reports.
ROUTES = (
    Route("gpt", "get_style_emb", get_style_emb, Phase.VOICE),
    Route("gpt", "generate", generate, Phase.DECODE, own=own_generate, check=check_seed, draws=True),
    Route("gpt", "forward", make_latents, Phase.LATENTS),
    Route("hifigan_decoder", "forward", vocode, Phase.VOCODER),
    Route("hifigan_decoder", "inference", vocode_in_inference_mode, Phase.VOCODER),
    Route("gpt", "compute_embeddings", compute_embeddings, Phase.DECODE, Kind.NOTED),
    Route("gpt", "get_generator", get_generator, Phase.DECODE, Kind.STEPS, own_generator, check_seed, draws=True),
    Route("", "get_conditioning_latents", get_conditioning_latents, Phase.VOICE, Kind.REMEMBERED),
    Route("", "get_speaker_embedding", get_speaker_embedding, Phase.VOICE, Kind.REMEMBERED),
    Route("", "inference", inference, Phase.AROUND, Kind.FINISHED),
    Route("", "inference_stream", inference_stream, Phase.AROUND, Kind.FINISHED),
)
