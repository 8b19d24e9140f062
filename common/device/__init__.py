"""Devices, and their memory."""
