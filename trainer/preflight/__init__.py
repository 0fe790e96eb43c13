"""Checks before a start: does each device, link, folder and node do what its peers and its kind do?"""
