"""The commands of ``qlm-live``, one file each."""
