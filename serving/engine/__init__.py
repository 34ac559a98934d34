"""Continuous batching: from requests of token ids to streams of sampled tokens."""
