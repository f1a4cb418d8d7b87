"""The Hugging Face Hub: model cards, run records, uploads."""
