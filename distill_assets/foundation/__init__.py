"""What every room stands on: errors, settings, homes, fingerprints, whole files, language models."""
