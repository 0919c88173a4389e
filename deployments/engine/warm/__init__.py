"""Engines that start without importing anything."""
