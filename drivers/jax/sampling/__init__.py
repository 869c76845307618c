"""Choosing tokens on the device: ``sampling`` decides, ``truncation`` cuts, ``noise`` draws."""
