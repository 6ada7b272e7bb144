"""What coqui-tts is: its surface as this library reads it, which models are supported, their weights and hooks, facts.

coqui-tts is imported where a function needs it, never by importing this package.
"""
