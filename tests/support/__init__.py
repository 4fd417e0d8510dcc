"""What tests of several modules share: encoders, texts and layouts that people bring."""
