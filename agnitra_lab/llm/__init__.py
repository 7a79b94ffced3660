"""The one door to language models: messages and a JSON schema in, `Reply` (text and token counts) out, or an LLMError.

Any OpenAI-compatible server will do (`client`), its replies can be kept (`cache`), recorded and answered from
(`recorded`). The answer is untrusted text: whoever asks parses it against a closed schema.
"""
