"""The one door to language models: messages and a JSON schema in, `Reply` (text and token counts) out, or an LLMError.

Any OpenAI-compatible server will do. The answer is untrusted text: whoever asks parses it against a closed schema.
"""
