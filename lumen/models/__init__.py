"""Whole models: the decoder, whose twelve switches are the families."""
