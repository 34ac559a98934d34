"""The HTTP server: OpenAI's completions API, introspection, metrics, and the web page."""
