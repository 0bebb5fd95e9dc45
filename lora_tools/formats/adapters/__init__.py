"""Adapter formats, one file each: key names and configs ↔ PEFT's."""
