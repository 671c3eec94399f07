"""From records to text: tables for people, settings to paste. Pure: no torch, no device."""
