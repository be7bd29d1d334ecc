"""Text for models: tokenizers, chat templates, gpt-oss's harmony format. It reads no weights."""
