"""Routes: coqui-tts's calls translated into graph calls."""
