"""A server of one patched model: an application of FastAPI, in OpenAI's contract. Needs the extra ``serve``."""
