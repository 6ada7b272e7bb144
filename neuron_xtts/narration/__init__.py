"""Text of any length as speech: sentences that XTTS can say, audio with pauses and timestamps, files of any format."""
