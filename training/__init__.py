"""What made the small voice that ships with quaver: data lists, codec, talker, export."""
