"""Corpora into shards, imported as `fastcpt.data_prep`. Never imports torch."""
