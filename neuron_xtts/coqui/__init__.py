"""What coqui-tts is: its surface as this library reads it, which models are supported, their weights and hooks."""
